"""Remove channels, key/value groups and experts, and let the channels that stay make up for it.

Promises:

* :mod:`.units` finds what can be removed, whatever the architecture, and decides how much stays; every layer keeps the
  same number. Channels, key/value groups and experts are one type, :class:`~.units.Unit`.
* :mod:`.trial` finds the change of ``config.json``, builds the smaller model, and shows that it computes what the dense
  model with zeros in place of the removed channels does. What does not pass is refused before any work.
* :mod:`.choose` says which channels stay (magnitude, energy, FLAP, OBS; GOA and Bypass-BP are in
  :mod:`fistapruner.papers`), and :mod:`.experts` which experts do (REAP).
* :mod:`.refit` fits the weights, and bias, of the channels that stay, on a Gram that is shrunk by cross-validation.
* :mod:`.smaller` describes the result: shapes, parameters, config, tensors that are left out.
"""
