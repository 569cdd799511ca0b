-- The append-only log: one row an event, one counter row that hands out positions.
-- Nobody logs in as fedota_owner; services reach the log through fedota.append and may read it.

create table fedota.head (
    id boolean primary key default true check (id),
    position bigint not null,
    hash bytea not null
);
insert into fedota.head (position, hash) values (0, decode(repeat('00', 32), 'hex'));

create table fedota.events (
    position bigint primary key,
    id uuid not null unique,
    type text not null check (type ~ '^[A-Za-z]+$'),
    schema int not null,
    subject text not null check (subject ~ '^[a-z]+/[0-9a-f-]+$'),
    version int not null,
    time timestamptz not null,
    actor text not null check (strpos(actor, E'\n') = 0),
    correlation uuid not null,
    causation uuid,
    traceparent text check (strpos(traceparent, E'\n') = 0),
    data bytea not null, -- the JSON as it was written: the hash covers these bytes, jsonb would not keep them
    hash bytea not null,
    unique (subject, version)
);

-- The answer to every append, by its idempotency key.
create table fedota.requests (
    key text primary key,
    fingerprint bytea not null,
    position bigint not null,
    version int not null,
    result bytea
);

-- Which login role may append which type of event.
create table fedota.writers (
    role text not null,
    type text not null,
    primary key (role, type)
);

create function fedota.refuse_change() returns trigger language plpgsql as $$
begin
    raise exception 'the event log is append-only: % on %.% is refused', tg_op, tg_table_schema, tg_table_name
        using errcode = 'insufficient_privilege';
end $$;

create trigger append_only before update or delete or truncate on fedota.events
    for each statement execute function fedota.refuse_change();
create trigger append_only before update or delete or truncate on fedota.requests
    for each statement execute function fedota.refuse_change();
alter table fedota.events enable always trigger append_only;
alter table fedota.requests enable always trigger append_only;

-- Appends many requests in one transaction, each accepted or refused alone, and answers them in order.
--
-- Arrays hold one element a request; those from ids on hold one element an event, all events of the first
-- request first (counts says how many each request has). A request's events go to one subject.
-- The lock on head makes positions gapless and visible in order: a reader that has seen position n has seen all before.
create function fedota.append(
    keys text[], fingerprints bytea[], subjects text[], expected int[], results bytea[], counts int[],
    actors text[], correlations uuid[], causations uuid[], traceparents text[],
    ids uuid[], types text[], schemas int[], datas bytea[]
) returns table (outcome text, "position" bigint, version int, result bytea)
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    head_position bigint;
    head_hash bytea;
    first_position bigint;
    stamp timestamptz;
    stamp_text text;
    stream_version int;
    known fedota.requests%rowtype;
    cursor_ int := 1;
begin
    if exists (
        select from unnest(types) as t (type)
        where not exists (select from fedota.writers w where w.role = session_user and w.type = t.type)
    ) then
        raise exception 'role % may not append these types of event', session_user using errcode = 'insufficient_privilege';
    end if;
    -- a stream is its owner's: one event of a stranger would shift the version that the owner's decisions expect
    if exists (select from unnest(subjects) as s (subject) where session_user <> 'fedota_' || split_part(s.subject, '/', 1)) then
        raise exception 'role % may not append to these streams', session_user using errcode = 'insufficient_privilege';
    end if;

    select h.position, h.hash into head_position, head_hash from fedota.head h for update;
    first_position := head_position;
    stamp := clock_timestamp();
    stamp_text := to_char(stamp at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"');

    for r in 1 .. cardinality(keys) loop
        select * into known from fedota.requests q where q.key = keys[r];
        if found then
            outcome := case when known.fingerprint = fingerprints[r] then 'repeated' else 'key_reused' end;
            position := known.position; version := known.version; result := known.result;
            return next;
            cursor_ := cursor_ + counts[r];
            continue;
        end if;

        select coalesce(max(e.version), 0) into stream_version from fedota.events e where e.subject = subjects[r];
        if expected[r] is not null and expected[r] <> stream_version then
            outcome := 'conflict'; position := head_position; version := stream_version; result := null;
            return next;
            cursor_ := cursor_ + counts[r];
            continue;
        end if;

        for i in cursor_ .. cursor_ + counts[r] - 1 loop
            head_position := head_position + 1;
            stream_version := stream_version + 1;
            head_hash := sha256(head_hash || convert_to(concat_ws(E'\n',
                head_position, ids[i], types[i], schemas[i], subjects[r], stream_version, stamp_text, actors[r],
                correlations[r], coalesce(causations[r]::text, ''), coalesce(traceparents[r], ''), ''
            ), 'UTF8') || datas[i]);
            insert into fedota.events values (
                head_position, ids[i], types[i], schemas[i], subjects[r], stream_version, stamp, actors[r],
                correlations[r], causations[r], traceparents[r], datas[i], head_hash
            );
        end loop;
        cursor_ := cursor_ + counts[r];
        insert into fedota.requests values (keys[r], fingerprints[r], head_position, stream_version, results[r]);
        outcome := 'accepted'; position := head_position; version := stream_version; result := results[r];
        return next;
    end loop;

    if head_position > first_position then
        update fedota.head h set position = head_position, hash = head_hash;
        perform pg_notify('fedota_events', head_position::text);
    end if;
end $$;
revoke all on function fedota.append from public;
