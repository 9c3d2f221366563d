-- A run's row is written several times a step: room on its page keeps most of these writes off its indexes (HOT).
ALTER TABLE longhaul_runs_run SET (fillfactor = 40, autovacuum_vacuum_scale_factor = 0.05);
ALTER TABLE longhaul_runs_leg SET (fillfactor = 70);
