"""From runs to processes, on this machine and on a cluster; lists of flags to runs."""
