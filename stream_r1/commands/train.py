"""``stream-r1 train``: distil by a recipe, resuming where an earlier run stopped."""
