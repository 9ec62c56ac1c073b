"""The rank of a task by measurement: many short runs over one base, what they come to, and what to take."""
