"""Many ranks: who they are, who does what, and how a model is spread over them."""
