-- What a reader at a cursor gets of a compacted event: one delta that stands for `from_seq` to its seq. Before the range that is all of
-- it; inside the rest, from the next seq on. `pieces` are the characters of each seq's text, joined by commas: for us, not for readers.
CREATE OR REPLACE FUNCTION longhaul_event_rest(p_payload jsonb, p_after bigint) RETURNS jsonb
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
SELECT CASE WHEN p_after < (p_payload->>'from_seq')::bigint THEN p_payload - 'pieces'
    ELSE (p_payload - 'pieces') || jsonb_build_object('from_seq', p_after + 1, 'text', substr(p_payload->>'text', 1 + (
        SELECT sum(had::integer)::integer
        FROM unnest((string_to_array(p_payload->>'pieces', ','))[:(p_after - (p_payload->>'from_seq')::bigint + 1)::integer]) AS had)))
    END
$$;
