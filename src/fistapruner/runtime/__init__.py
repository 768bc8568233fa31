"""Use the machine, independent of models.

* :mod:`.files`: a file is whole or absent, and what the disk refuses is one line.
* :mod:`.machine`: what a report says of the machine, and the processes of a launcher; without torch.
* :mod:`.devices`: the device, the threads, and their memory within the limits of containers and jobs.
* :mod:`.numerics`: the precision of products, random numbers, and a run undisturbed by the calling program.
* :mod:`.show`: sizes, times and tables as text, progress, and time by phase; without torch.
"""
