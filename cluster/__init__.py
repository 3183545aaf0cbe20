"""The machines: Ray Train worker group, placement, and the entry that `ray job submit` runs."""
