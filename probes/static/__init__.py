"""What do weight files alone tell about the connections? What they are before any forward."""
