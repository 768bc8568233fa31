"""The run directory: all that the processes of a run share, and that a later process trusts.

Contract:

- A killed run goes on with the same command and ends with the same bytes on the same machine. Every file is whole or
  absent. Tensors count only with the sealed record beside them (:mod:`.store`); what is damaged is made again.
- ``run.json`` holds what was asked and decided (:mod:`.settled`). It is written once, before the long work. The same
  settings, model files, texts and versions go on; anything else is another run, and is refused in one sentence.
- One process works on a run at a time, and decides under its lock (:mod:`.lock`). ``status``, ``inspect`` and
  ``report`` take no lock, and change nothing of a run at work.
- A finished run keeps its report (:mod:`.records`, :mod:`.results`) and its checkpoint. Readers keep unknown keys.
- Only files that a run wrote are ever removed (:mod:`.directory`).
"""
