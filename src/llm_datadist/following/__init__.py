"""Following a directory: who is announced there is linked, and who left is not.

`plan.py` decides, and knows no clock; `driver.py` carries it out in the loop's thread;
`watching.py` and `announcing.py` are the threads that ask and tell the directory, which may take
its time; `follower.py` is what the program has of it.
"""
