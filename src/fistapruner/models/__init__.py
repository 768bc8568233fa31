"""Models as the other rooms see them: a checkpoint on disk, run with one decoder layer in memory.

``source`` finds a model by what a user calls it, ``gguf`` converts a GGUF file. ``checkpoint`` reads a folder tensor by
tensor, under the names that its files give. ``names`` finds a model's tensors among them: one that is missing is an
error, unless one prefix is common to all. ``experts`` shows mixtures as separate linear operators, however they are
stored. ``build`` makes the architecture without weights, or loads a whole model; ``layers`` runs it layer by layer, or
refuses it before any work. ``operators`` finds what is pruned, ``links`` the channels that move together. Both try it
on a decoder layer: nothing is listed by architecture.

``write`` makes a checkpoint that appears whole or not at all; ``record`` is what it claims, ``low_rank`` a LoRA adapter
beside it, ``export`` a GGUF file of it.
"""
