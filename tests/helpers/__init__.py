"""What several test files share, with one definition each.

models.py         a small network, its data and metric
seeds.py          seeds of all random generators
metrics.py        losses and metrics of a few lines
datasets.py       datasets and iterables of batches
samplers.py       samplers and batch samplers
compare.py        compares nests of numbers and tensors, and the weights of models
reference.py      a bare training loop to compare with
compiling.py      options of torch.compile that take little time
interruptions.py  exceptions and callbacks that end a fit early
bad_input.py      data, models and messages of the tests of wrong input
callbacks.py      fits with callbacks, and a callback that resumes the others
files.py          files of short runs
exact.py          a script that fits with a checkpoint, is killed, and is started again
runs.py           calls of fit of many kinds, to interrupt and resume
kills.py          kills fits with SIGKILL again and again
launch.py         starts processes, under torchrun too
ranks/            cases that torchrun runs on several processes
shards.py         the same with fsdp
peers.py          processes that make their group themselves
trackers.py       what is in the files of TensorBoard, MLflow and W&B
paths.py          the folders of the repository
modules.py        the modules of the package
without_rooms.py  runs a script on copies of the package from which rooms are deleted
pages.py          what a page prints
"""
