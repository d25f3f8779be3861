"""Settings for all tests."""

import torch

# On tensors this small a second thread only waits, and on a busy machine it waits long.
torch.set_num_threads(1)
