"""Import this before torch: its threads then sleep while they wait for work.

GNU OpenMP's spin by default. Where other processes share the cores, a thread that spins keeps the
one it waits for from running: a step of train_lm.py took 10 s instead of 0.1. Set OMP_WAIT_POLICY
yourself for anything else.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
