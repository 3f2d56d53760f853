-- Make a session, unless it exists.
--
-- KEYS  see session_functions.lua
-- ARGV  1 incarnation: a name for this very session, so that the same call again finds its own work
--       2 member   3 ttl, ms   4 user   5 session id   6 last update time   7 "1" when it is ephemeral
--       8, 9, 10 number of session, app and user fields, then these: field, JSON, …
-- Answer  {app state, user state}, or false: a session of that name exists
-- with: session_functions
local before = redis.call('HGET', KEYS[1], 'incarnation')
if before and before ~= ARGV[1] then return false end
if not before then
  local now = now_ms()
  -- One of that name expired, and nobody has said so yet.
  if redis.call('ZSCORE', KEYS[6], ARGV[2]) then
    note_expired(KEYS[9], now, KEYS[8], ARGV[2])
  end
  redis.call('HSET', KEYS[1], 'incarnation', ARGV[1], 'last', '0-0', 'bytes', '0', 'ttl', '0',
    'user', ARGV[4], 'id', ARGV[5], 'at', ARGV[6])
  if ARGV[7] == '1' then redis.call('HSET', KEYS[1], 'ephemeral', '1') end
  local at = write(KEYS[1], 11, tonumber(ARGV[8]))
  at = write(KEYS[4], at, tonumber(ARGV[9]))
  write(KEYS[5], at, tonumber(ARGV[10]))
  redis.call('ZADD', KEYS[6], '+inf', ARGV[2])
  redis.call('ZADD', KEYS[7], '+inf', ARGV[2])
  keep(now, tonumber(ARGV[3]), ARGV[2])
  forget_all_expired(now)
end
return {redis.call('HGETALL', KEYS[4]), redis.call('HGETALL', KEYS[5])}
