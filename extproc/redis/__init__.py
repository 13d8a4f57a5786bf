"""Redis or Valkey as gate, filter and auth service use it: questions and channels in a loop, writes in a thread."""
