"""Remove whole channels of a decoder layer, and let the remaining ones make up for them."""
