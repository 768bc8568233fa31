"""Hidden states between decoder layers, and the forward and backward passes that make and watch them.

``store`` holds hidden states, in memory or in files, and spares passes through modules whose weights are final;
``stream`` runs windows through the layers, one in memory at a time, and gradients back, and compares that with the
model's own forward pass.
"""
