"""What the Python packages of all frameworks share."""
