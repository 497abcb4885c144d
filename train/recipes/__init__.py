"""What is trained and how: recipes, their schedules, and the registry of those that come with alexprep."""
