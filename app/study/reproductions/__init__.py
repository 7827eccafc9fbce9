"""Which results of papers hold in small networks? Studies as declared cells, run one by one, kept, and told in sentences."""
