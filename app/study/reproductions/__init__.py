"""Which results of papers hold in small networks? Studies as declared cells, run one by one and summarised in sentences."""
