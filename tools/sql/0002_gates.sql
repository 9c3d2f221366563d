-- Rates: at most so many starts, or tokens, in any stretch of so many seconds. What was used is a row, so the bound is exact.

-- How much of the rate is left now.
CREATE OR REPLACE FUNCTION longhaul_rate_left(p_key text, p_count bigint, p_seconds double precision, p_now timestamptz)
RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN
    RETURN p_count - (SELECT coalesce(sum(amount), 0) FROM longhaul_tools_rateuse
                      WHERE key = p_key AND at > p_now - make_interval(secs => p_seconds));
END $$;

-- Uses one of each rate among the gates (or p_amount), and removes what no longer counts.
CREATE OR REPLACE FUNCTION longhaul_rate_use(p_gates jsonb, p_now timestamptz, p_amount bigint DEFAULT 1)
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO longhaul_tools_rateuse (key, at, amount)
    SELECT g.key, p_now, p_amount FROM jsonb_each(p_gates) AS g WHERE g.value ? 'count';
    DELETE FROM longhaul_tools_rateuse WHERE id IN (
        SELECT u.id FROM jsonb_each(p_gates) AS g JOIN longhaul_tools_rateuse u
          ON u.key = g.key AND u.at <= p_now - make_interval(secs => (g.value->>'seconds')::double precision)
        WHERE g.value ? 'count' LIMIT 100 FOR UPDATE OF u SKIP LOCKED);
END $$;
