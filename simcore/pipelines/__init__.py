"""Pipeline schedules with several stages on a rank, split backwards, or two directions."""
