"""A workbook on reinforcement fine-tuning of small language models: the code behind it.

`import rlnb` loads nothing; `rlnb.model.load` and its kin are imported when they are first used.
"""

import os

__version__ = "0.1.0"
# A thread of torch's that waits for the others spins, and takes the core from whatever else wants it:
# beside one busy process training gets several times slower. So it spins briefly, then sleeps. libgomp
# reads this when torch is loaded; OMP_WAIT_POLICY=active brings the old way back.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
