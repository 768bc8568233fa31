"""Measure the dense model once, and decide from it where zeros go and which channels share a group.

Nothing is pruned here. Each module takes numbers, tensors and modules; only :mod:`.measure` reads recipes.

* :mod:`.fisher`: how sensitive predictions are to errors of every output row and decoder layer.
* :mod:`.curves`: the error of every operator at a few sparsities, and with it a cost in nats.
* :mod:`.allocate`: a sparsity for every operator, from curves or outliers, with an exact total of zeros.
* :mod:`.channels`: the order of channels and the rotation of heads in which an n:m pattern loses least.
* :mod:`.measure`: what a recipe asks of all this, measured in one forward and one backward pass.
"""
