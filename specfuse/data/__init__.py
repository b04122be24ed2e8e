"""Reading what goes in: video files and recordings of answers."""
