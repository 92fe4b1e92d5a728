"""The flags that cannot change what a run computes: they may differ when it is resumed.

Where things lie, how the work is spread, what is kept and shown. (pmap and shard_map differ in the
last bits of a sum, as two machines do.) No imports, so that the sweep stays light.
"""

FREE_FLAGS = frozenset(
    {
        *("name", "runs_dir", "data_dir", "compilation_cache"),
        *("parallel", "workers"),
        *("keep_checkpoints", "profile", "allow_changed"),
    }
)
