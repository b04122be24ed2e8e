"""What goes in: video files, recordings of answers, and a procedural driving world."""
