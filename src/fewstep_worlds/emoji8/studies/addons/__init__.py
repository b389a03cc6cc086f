"""What people put on top of a checkpoint, made on the base teacher and used with students that never saw it."""
