-- Time is the database's. The offset row exists only under the test plugin.
CREATE OR REPLACE FUNCTION longhaul_now() RETURNS timestamptz LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    RETURN clock_timestamp() + coalesce((SELECT ahead FROM longhaul_threads_clock LIMIT 1), interval '0');
END $$;

-- A UUIDv7 on every supported Postgres (RFC 9562: 48 bits of unix milliseconds, version, variant, random).
CREATE OR REPLACE FUNCTION longhaul_uuid7() RETURNS uuid LANGUAGE sql VOLATILE AS $$
    SELECT encode(
        set_bit(set_bit(
            overlay(uuid_send(gen_random_uuid())
                PLACING substring(int8send((extract(epoch FROM clock_timestamp()) * 1000)::bigint) FROM 3)
                FROM 1 FOR 6),
            52, 1), 53, 1), 'hex')::uuid
$$;
