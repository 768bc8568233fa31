"""Train what pruning left, with every zero kept.

``run.py`` is the page of ``recover`` and ``align``, from top to bottom: settle, open and train (``recovery.py``, with
the plan of ``plan.py``; what ``align`` does in its own way is ``alignment.py``), write, measure and report.

Everything that trains meets in the parameters behind a mask (``masked.py``) and in one loop (``loop.py``), whose losses
are in ``loss.py``. Block reconstruction inside ``prune`` is ``reconstruct.py``. ``distributed.py`` divides a run among
the processes of torchrun. ``hold_mask.py`` and ``adapters.py`` keep the zeros where somebody else trains.

The promises: zeros are those of the input, bit for bit; the result is never worse than the input on what is held out; a
run that was killed goes on with the same bytes on the same machine.
"""
