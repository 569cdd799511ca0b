-- The same append, in few statements however many requests there are: one looks everything up, a loop without
-- statements decides and chains, two insert. What it answers, what it refuses and what the hash covers is as before.
--
-- Arrays hold one element a request; those from ids on hold one element an event, all events of the first
-- request first (counts says how many each request has). A request's events go to one subject.
-- The lock on head makes positions gapless and visible in order: a reader that has seen position n has seen all before.
-- Nobody waits for it longer than lock_timeout: whoever sits on it does not stop the callers for good.
-- Plans are generic, because one for each length of the arrays is made anew in each call, at more than it saves.
create or replace function fedota.append(
    keys text[], fingerprints bytea[], subjects text[], expected int[], results bytea[], counts int[],
    actors text[], correlations uuid[], causations uuid[], traceparents text[],
    ids uuid[], types text[], schemas int[], datas bytea[]
) returns table (outcome text, "position" bigint, version int, result bytea)
language plpgsql security definer
set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set lock_timeout = '3s'
as $$
declare
    asked constant int := cardinality(keys);
    sent constant int := cardinality(ids);
    head_position bigint;
    head_hash bytea;
    first_position bigint;
    stamp timestamptz;
    stamp_text text;
    context text;
    allowed boolean;
    -- of each request
    known boolean[];    -- its key was there before this call
    versions int[];     -- of its stream; kept up to date where the stream comes first
    reached bigint[];   -- the answer's position and version
    grown int[];
    ends int[];         -- its last event in the arrays
    -- of each event
    owners int[] := array_fill(null::int, array[sent]); -- the request, where that was accepted
    hashes bytea[] := array_fill(null::bytea, array[sent]);
    twin int;
    stream int;
    e int := 0;
begin
    -- from here on subscripts need no second thought: one dimension, from 1, of one length
    if asked = 0 then
        return;
    elsif coalesce(
        '[1:' || asked || ']' <> any (array[
            array_dims(keys), array_dims(fingerprints), array_dims(subjects), array_dims(expected), array_dims(results),
            array_dims(counts), array_dims(actors), array_dims(correlations), array_dims(causations),
            array_dims(traceparents)
        ])
        or sent > 0 and '[1:' || sent || ']' <> any (array[
            array_dims(ids), array_dims(types), array_dims(schemas), array_dims(datas)
        ])
        or 0 > any (counts) or array_position(keys, null) is not null,
        true
    ) then
        raise exception 'the arrays of this append do not fit each other' using errcode = 'invalid_parameter_value';
    end if;

    select h.position, h.hash into head_position, head_hash from fedota.head h for update;
    first_position := head_position;
    stamp := clock_timestamp();
    stamp_text := to_char(stamp at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"');

    -- scalar subqueries: PostgreSQL might answer `exists` or a join by reading the whole table
    select types <@ array(select w.type from fedota.writers w where w.role = session_user),
        array_agg((select true from fedota.requests q where q.key = keys[r]) order by r),
        array_agg((select max(x.version) from fedota.events x where x.subject = subjects[r]) order by r)
    into allowed, known, versions
    from generate_series(1, asked) as r;
    if allowed is not true then
        raise exception 'role % may not append these types of event', session_user using errcode = 'insufficient_privilege';
    end if;

    for r in 1 .. asked loop
        -- a stream is its owner's: one event of a stranger would shift the version that the owner's decisions expect
        if starts_with('fedota_' || subjects[r], session_user || '/') is not true then
            raise exception 'role % may not append to these streams', session_user using errcode = 'insufficient_privilege';
        end if;
        twin := array_position(keys, keys[r]);
        stream := array_position(subjects, subjects[r]);
        version := coalesce(versions[stream], 0);
        if known[r] then
            select case when q.fingerprint = fingerprints[r] then 'repeated' else 'key_reused' end,
                q.position, q.version, q.result
            into outcome, position, version, result from fedota.requests q where q.key = keys[r];
        elsif twin < r then -- a request of this call that was accepted: the keys of others are null by now
            outcome := case when fingerprints[twin] = fingerprints[r] then 'repeated' else 'key_reused' end;
            position := reached[twin]; version := grown[twin]; result := results[twin];
        elsif expected[r] <> version then
            outcome := 'conflict'; position := head_position; result := null;
        else
            outcome := 'accepted';
            context := concat_ws(E'\n',
                stamp_text, actors[r], correlations[r], coalesce(causations[r]::text, ''), coalesce(traceparents[r], ''), ''
            );
            for i in e + 1 .. e + counts[r] loop
                head_position := head_position + 1;
                version := version + 1;
                head_hash := sha256(head_hash || convert_to(concat_ws(E'\n',
                    head_position, ids[i], types[i], schemas[i], subjects[r], version, context
                ), 'UTF8') || datas[i]);
                hashes[i] := head_hash;
                owners[i] := r;
            end loop;
            versions[stream] := version;
            position := head_position; result := results[r];
        end if;
        if outcome <> 'accepted' then
            keys[r] := null; -- it leaves no trace
        end if;
        e := e + counts[r];
        ends[r] := e; reached[r] := position; grown[r] := version;
        return next;
    end loop;
    if e <> sent then
        raise exception 'the arrays of this append do not fit each other' using errcode = 'invalid_parameter_value';
    end if;

    insert into fedota.requests
    select keys[r], fingerprints[r], reached[r], grown[r], results[r]
    from generate_series(1, asked) as r where keys[r] is not null;
    if head_position > first_position then
        insert into fedota.events
        select reached[owners[i]] - ends[owners[i]] + i, ids[i], types[i], schemas[i], subjects[owners[i]],
            grown[owners[i]] - ends[owners[i]] + i, stamp, actors[owners[i]], correlations[owners[i]],
            causations[owners[i]], traceparents[owners[i]], datas[i], hashes[i]
        from generate_series(1, sent) as i where owners[i] is not null;
        update fedota.head h set position = head_position, hash = head_hash;
        perform pg_notify('fedota_events', head_position::text);
    end if;
end $$;
