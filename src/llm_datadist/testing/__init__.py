"""Test support that ships with the package: real processes, real sockets, real memory.

| module | what is in it |
| --- | --- |
| `process` | ObjectProcess: your object in a process of its own; wait_any: who answers first |
| `cluster` | Node, NodeProcess: a cluster with memory that a test fills and looks at |
| `linked` | linked_clusters: clusters in a process each, every two linked |
| `faults` | FaultProxy: a network that cuts, stalls, slows and corrupts |
| `assertions` | assert_cache_equal, assert_untouched: which tensor, block and byte differ |
| `timing` | takes_at_most, eventually |
| `fixtures` | the types of the pytest fixtures |

None of them needs pytest, which finds the fixtures when the package is installed. More: the guide
Testing kit.
"""
