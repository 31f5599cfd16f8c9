"""The callbacks that come with the library. The base class, with its timetable, is in callback.py.

averaging.py   EMA
files.py       ModelCheckpoint, CSVLogger
rates.py       LRScheduler
stopping.py    EarlyStopping, Timer
monitor.py     what watches a value of the logs
names.py       refuses a name that no epoch will log
"""
