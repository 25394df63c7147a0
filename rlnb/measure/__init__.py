"""What a model or a judge can do, how far it has moved, how far annotators agree, and how sure that is."""
