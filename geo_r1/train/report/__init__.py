"""What a run tells: the log, transcripts, plots and the report page."""
