"""Hidden states between decoder layers, and the forward passes that make and watch them."""
