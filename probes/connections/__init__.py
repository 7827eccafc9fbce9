"""What does one stream connection do? Each family detected, read and proven."""
