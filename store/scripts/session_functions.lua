-- What the session scripts share. Their KEYS are the same, in this order:
--   1 session (hash)   2 events (stream)   3 seen (hash: event id -> entry ids)   4 app state (hash)
--   5 user state (hash)   6 sessions of the app (sorted set)   7 sessions of the user (sorted set)
--   8 last uses of the app's sessions (sorted set)   9 ended (sorted set)
-- with: conversation_functions
-- The number of an entry: its id is <ms>-<number>.
local function number_of(id)
  return tonumber(string.match(id, '%-(%d+)$'))
end

-- Writes pairs ARGV[first], ARGV[first + 1], … and answers where they end.
local function write(key, first, pairs_)
  for i = first, first + 2 * pairs_ - 2, 2 do redis.call('HSET', key, ARGV[i], ARGV[i + 1]) end
  return first + 2 * pairs_
end

-- The lists of app and user forget what has expired.
local function forget_all_expired(now)
  forget_expired(now, KEYS[6], KEYS[8], KEYS[9])
  redis.call('ZREMRANGEBYSCORE', KEYS[7], '-inf', whole(now))
  set_life(KEYS[7], longest_of(KEYS[7]), 0)
end

-- The session was used: `session_retention` counts from now. Its time to live begins afresh; ttl is in
-- ms, 0 is for ever.
local function keep(now, ttl, member)
  -- A session can be read also where Redis takes no more writes.
  redis.pcall('ZADD', KEYS[8], whole(now), member)
  local before = redis.call('HGET', KEYS[1], 'ttl') or '0'
  if ttl == 0 and before == '0' then return end
  redis.call('HSET', KEYS[1], 'ttl', whole(ttl))
  local score = '+inf'
  if ttl > 0 then score = whole(now + ttl) end
  for i = 1, 3 do
    if ttl > 0 then redis.call('PEXPIREAT', KEYS[i], score) else redis.call('PERSIST', KEYS[i]) end
  end
  redis.call('ZADD', KEYS[6], score, member)
  redis.call('ZADD', KEYS[7], score, member)
  forget_all_expired(now)
end
