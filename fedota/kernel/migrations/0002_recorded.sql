-- The answer that was given to one idempotency key, for who knows that key; nobody may list the keys of others.
create function fedota.recorded(wanted text)
returns table (fingerprint bytea, "position" bigint, version int, result bytea)
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
    select q.fingerprint, q.position, q.version, q.result from fedota.requests q where q.key = wanted
$$;
revoke all on function fedota.recorded from public;
