"""What several test files share, with one definition each.

models.py         a small network, its data and metric
seeds.py          seeds of all random generators
metrics.py        losses and metrics of one line
datasets.py       datasets and iterables of batches
samplers.py       samplers and batch samplers
interruptions.py  exceptions and callbacks that end a fit early
reference.py      bare training loops to compare with
compiling.py      options of torch.compile that take little time
paths.py          the folders of the repository
pages.py          reads the README and the pages of docs/
launch.py         starts scripts under torchrun and compares what their processes found
ranks/            cases that torchrun runs on several processes
shards.py         the same with fsdp
peers.py          processes that make their group themselves
runs.py           calls of fit of many kinds, to interrupt and resume
kills.py          kills fits with SIGKILL again and again
"""
