-- What the session scripts share. Their KEYS are the same, in this order:
--   1 session (hash)   2 events (stream)   3 seen (hash: event id -> entry ids)   4 app state (hash)
--   5 user state (hash)   6 sessions of the app (sorted set)   7 sessions of the user (sorted set)
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- The number of an entry: its id is <ms>-<number>.
local function number_of(id)
  return tonumber(string.match(id, '%-(%d+)$'))
end

-- Writes pairs ARGV[first], ARGV[first + 1], … and answers where they end.
local function write(key, first, pairs_)
  for i = first, first + 2 * pairs_ - 2, 2 do redis.call('HSET', key, ARGV[i], ARGV[i + 1]) end
  return first + 2 * pairs_
end

-- The lists forget what has expired, and go when all they name has.
local function forget_expired(now)
  for _, list in ipairs({KEYS[6], KEYS[7]}) do
    redis.call('ZREMRANGEBYSCORE', list, '-inf', string.format('%.0f', now))
    local longest = redis.call('ZREVRANGE', list, 0, 0, 'WITHSCORES')[2]
    if longest == 'inf' then
      redis.call('PERSIST', list)
    elseif longest then
      redis.call('PEXPIREAT', list, string.format('%.0f', tonumber(longest)))
    end
  end
end

-- Starts the time to live of a session afresh; ttl is in ms, 0 is for ever.
local function keep(now, ttl, member)
  local before = redis.call('HGET', KEYS[1], 'ttl') or '0'
  if ttl == 0 and before == '0' then return end
  redis.call('HSET', KEYS[1], 'ttl', string.format('%.0f', ttl))
  local score = '+inf'
  if ttl > 0 then score = string.format('%.0f', now + ttl) end
  for i = 1, 3 do
    if ttl > 0 then redis.call('PEXPIREAT', KEYS[i], score) else redis.call('PERSIST', KEYS[i]) end
  end
  redis.call('ZADD', KEYS[6], score, member)
  redis.call('ZADD', KEYS[7], score, member)
  forget_expired(now)
end
