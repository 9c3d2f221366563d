-- Each of these rows is written two or three times in its first second: room on its page for it.
ALTER TABLE longhaul_tools_toolcall SET (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05);
ALTER TABLE longhaul_tools_toolattempt SET (fillfactor = 70);
ALTER TABLE longhaul_tools_worker SET (fillfactor = 40);
