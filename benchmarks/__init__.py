"""One file per question, run as `trunkline bench NAME`. A benchmark reports what ran."""
