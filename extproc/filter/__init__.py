"""The ext_proc conversation: one chat request and its answer, as Envoy shows them."""
