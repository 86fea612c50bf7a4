"""Find the neurons behind a behaviour of a language model, prune them, and prove what that did."""

import time

STARTED = time.monotonic()  # before the slow imports, which are part of what a stage costs
