"""The control plane: the store of jobs, what may be done with them, and who does it.

It knows runners of jobs by a protocol, never Ray or torch.
"""
