"""What carries messages in a rehearsal: this process, or Flower's own engines. The apps are the same in all."""
