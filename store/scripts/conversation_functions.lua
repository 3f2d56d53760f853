-- What the scripts about conversations share: the clock, and the lists of an app.
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function whole(number)
  return string.format('%.0f', number)
end

local WAIT_FOR_WORKER_MS = 7 * 86400000
local ENDED_KEPT = 10000

-- Notes that a conversation is no more, for a worker to write into the log. Where no worker comes the
-- oldest notes go, and after a week without a new one all of them.
local function note_end(ended, now, note)
  redis.call('ZADD', ended, whole(now), note)
  redis.call('ZREMRANGEBYRANK', ended, 0, -ENDED_KEPT - 1)
  redis.call('PEXPIRE', ended, WAIT_FOR_WORKER_MS)
end

-- The same for one that expired. Its last use tells it from another of its name that expired before.
local function note_expired(ended, now, used, member)
  local last = tonumber(redis.call('ZSCORE', used, member) or '0')
  note_end(ended, now, cjson.encode({member = member, reason = 'ttl', used_ms = last}))
end

-- A list of names goes when all it names has expired, and `grace` ms after that.
local function set_life(list, longest, grace)
  if longest == 'inf' then
    redis.call('PERSIST', list)
  elseif longest then
    redis.call('PEXPIREAT', list, whole(tonumber(longest) + grace))
  end
end

local function longest_of(list)
  return redis.call('ZREVRANGE', list, 0, 0, 'WITHSCORES')[2]
end

-- The lists of an app forget what has expired. A second later: what is there at the beginning of a
-- script may be past its time by the clock at its end.
local function forget_expired(now, sessions, used, ended)
  local expired = redis.call('ZRANGEBYSCORE', sessions, '-inf', whole(now - 1000), 'LIMIT', 0, 1000)
  for _, member in ipairs(expired) do
    note_expired(ended, now, used, member)
    redis.call('ZREM', sessions, member)
    redis.call('ZREM', used, member)
  end
  local longest = longest_of(sessions)
  set_life(sessions, longest, WAIT_FOR_WORKER_MS)
  set_life(used, longest, WAIT_FOR_WORKER_MS)
end
