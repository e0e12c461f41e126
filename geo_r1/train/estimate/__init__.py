"""What a run takes, calculated: memory, steps, operations; and the page that says so."""
