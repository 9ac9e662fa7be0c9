"""What an ensemble needs, known before a weight is loaded: members, matrices, memory, the cost of tasks."""
